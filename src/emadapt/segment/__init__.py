"""From study to tool: a user's volume segmented with a trained model, at any size."""
