"""Other people's training loops, one module each; a module needs its peer, the package does not."""
