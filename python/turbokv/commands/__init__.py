"""The subcommands of `turbokv`, a file each: options, progress, tables. What they measure with stands one folder up."""
