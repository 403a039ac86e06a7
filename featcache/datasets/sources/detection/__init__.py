"""Object detection data sets as multi-label classification: COCO and PASCAL VOC."""
