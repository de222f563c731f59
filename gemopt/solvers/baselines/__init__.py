"""What engines, papers and textbooks do."""
