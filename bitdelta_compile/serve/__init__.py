"""Many tenants on one base: slots, row index, the attached model."""
