"""Speed and memory, measured beside the peers that are installed: `python3 -m cellop_nb bench` from a checkout."""
