"""Put a tuner on a model and take it off again; the plugin contract is `tuner.py`."""
