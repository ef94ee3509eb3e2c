"""The pixels of a picture that `images` opened: as 8-bit RGB of a usable size, and transformed."""
