"""What `gemopt.solve` is made of: all layers within one time, moves and memory over them, links, and the answer."""
