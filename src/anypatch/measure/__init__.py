"""What a patch size costs and keeps."""
