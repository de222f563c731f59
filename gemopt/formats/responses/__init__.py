"""Responses of engines that tell the experts of their tokens."""
