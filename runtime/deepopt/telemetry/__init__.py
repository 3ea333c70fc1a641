"""What is watched: JSON lines, events, metrics, traces, device peaks. Imports no torch."""
