"""What builds the site, and runs the committed notebooks again; no part of the wheel."""
