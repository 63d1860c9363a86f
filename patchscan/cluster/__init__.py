"""Run trainings and scans on Kubernetes, and roll out models. No other package knows Kubernetes."""
