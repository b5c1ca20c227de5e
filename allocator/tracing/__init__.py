"""One forward, recorded: every call that reaches torch's dispatcher, on tensors without storage."""
