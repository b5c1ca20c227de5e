"""Programs out of files that hold no Python: exported programs and TorchScript archives."""
