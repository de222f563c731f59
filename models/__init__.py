"""What a MoE network is to gemopt: find its routers and experts (torch)."""
