"""What lies on a disk or on the Hub: checkpoints, published formats, adapters, sessions."""
