"""What `gpu_check.py` is made of: the compiled operator without MXNet."""
