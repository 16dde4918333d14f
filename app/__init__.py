"""A web page that answers questions about photographs and rasters: `mfrsvlm app`."""
