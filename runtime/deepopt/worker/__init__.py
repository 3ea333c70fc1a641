"""The data plane: one worker process per GPU or CPU slot."""
