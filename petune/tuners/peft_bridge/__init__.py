"""Parts of `petune.tuners.peft`: options, target layers, wrapping, saving."""
