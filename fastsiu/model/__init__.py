"""Any image-text model of transformers: loading it, its adapter, running it fast, and what that
takes."""
