"""A stand-in, written for these tests: DINOv2's repository is on no package index. Class names,
parameter names, signatures and arithmetic are those of its ``dinov2/layers``; what `accelerate`
does not look at (masks of nested images, initialisation) is left out."""
