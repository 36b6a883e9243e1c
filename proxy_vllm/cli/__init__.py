"""The `proxy-vllm` command: one file a subcommand."""
