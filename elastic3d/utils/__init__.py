"""What every other room stands on: errors, options, devices, and files that are read with care and written whole or not
at all."""
