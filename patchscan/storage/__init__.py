"""Where bytes lie: an S3 bucket or a folder behind one `Store`, and trying again where it does not answer."""
