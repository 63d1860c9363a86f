"""The pages of evaluation and of videos; they extend reporting's base.html."""
