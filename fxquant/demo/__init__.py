"""The trained example models and the image set they were trained on."""
