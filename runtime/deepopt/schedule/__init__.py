"""What order: schedules as data. Built, verified, simulated and drawn here; executed elsewhere.

Pure: nothing in this package imports torch, ray or triton.
"""
