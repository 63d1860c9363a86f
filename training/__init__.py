"""From a folder of images to a run folder and an archive: index, audit, train, archive."""
