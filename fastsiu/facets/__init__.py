"""The four targets: each turns a concept, an image and a model into samples."""
