"""The programs: subcommands of `recognition`, their arguments, and how they start and end."""
