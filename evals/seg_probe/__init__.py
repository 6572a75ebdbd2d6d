"""The segmentation linear probe: classifies every pixel from frozen tokens, through MMSegmentation."""
