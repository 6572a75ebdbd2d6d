"""The segmentation linear probe: what frozen tokens say of every pixel, through MMSegmentation."""
