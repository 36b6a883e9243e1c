"""What stands before vLLM's HTTP application: checks of requests, and replicas on Ray Serve."""
