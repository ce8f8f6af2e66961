"""A model that several processes compute together. start.py begins, split_model.py computes, group.py exchanges."""
