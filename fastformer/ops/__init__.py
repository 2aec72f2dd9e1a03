"""One module an operator: raw schema with its fake, validation, autograd, public function."""
