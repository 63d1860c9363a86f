"""HTML templates of the evaluation and video reports. They extend base.html of patchscan.reporting."""
