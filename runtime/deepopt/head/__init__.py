"""The control plane: decides, journals, then acts; never touches a tensor."""
