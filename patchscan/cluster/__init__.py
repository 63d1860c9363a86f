"""Everything that knows Kubernetes: the API client, submitting and following Jobs, coordinating scans, roll-outs."""
