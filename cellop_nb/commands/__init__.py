"""The command line: one module per subcommand, standard library only at import."""
