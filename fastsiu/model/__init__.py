"""Any image-text model of transformers: how it is loaded and adapted, how it runs fast, and how
much memory that takes."""
