"""What a user calls: image to mesh, text to image."""
