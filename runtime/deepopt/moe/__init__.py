"""Mixture of experts: routing, dispatch, balance."""
