"""One file per engine, and what each of them keeps its recordings in."""
