"""Find the images in a bucket that were made by a generator, and know how far to trust the answer."""
