"""One adapter a family of kernels: its functions behind `Recurrence`."""
