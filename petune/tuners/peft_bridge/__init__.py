"""What `petune.tuners.peft` is made of: options, target layers, wrapping, saving."""
