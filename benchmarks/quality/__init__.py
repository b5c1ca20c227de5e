"""How good is the network that comes back? Trained networks, allocated in many ways, at equal FLOPs."""
