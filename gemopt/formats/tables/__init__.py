"""Tables of latencies as anyone keeps them, read as a profile; `kernel` begins."""
