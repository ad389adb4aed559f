"""What a familial model is: its geometry, its layers, its files, and where they are kept."""
