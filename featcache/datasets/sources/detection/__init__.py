"""Data sets of annotated objects, read as which classes are in an image: COCO and PASCAL VOC."""
