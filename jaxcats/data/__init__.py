"""From files to batches: labels, splits, the index, decoding, the tf.data pipeline, augmentation, and checks of a dataset."""
